import torch, torch.nn.functional as F
def linear(x, w, bias=None): return F.linear(x, w, bias)
def linear_out(x, w, out, bias=None):
    out.copy_(F.linear(x, w, bias)); return out
