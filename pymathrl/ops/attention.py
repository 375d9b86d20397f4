import torch
PAGE = 16
from pymathrl.ops.rotary import rotary_ref
def attention(qkv, offsets, heads, kv_heads):
    e = qkv.shape[1]//(heads+2*kv_heads); outs=[]
    for a,b in zip(offsets.tolist(), offsets.tolist()[1:]):
        q,k,v = qkv[a:b].view(b-a,-1,e).split([heads,kv_heads,kv_heads],1)
        g=heads//kv_heads
        k=k.repeat_interleave(g,1); v=v.repeat_interleave(g,1)
        s=torch.einsum('ihe,jhe->hij',q,k)+torch.full((b-a,b-a),-torch.inf).triu(1)
        outs.append(torch.einsum('hij,jhe->ihe',s.softmax(-1),v).flatten(1))
    return torch.cat(outs)
def paged_attention(qkv, position, slot, table, rope, keys, values, out, *, heads, kv_heads, scale, q_norm=None, k_norm=None, eps=1e-6):
    e = qkv.shape[1]//(heads+2*kv_heads); g=heads//kv_heads
    out.zero_()
    for r in range(len(qkv)):
        s=int(slot[r]); p=int(position[r])
        if s<0: continue
        x=rotary_ref(qkv[r:r+1], position[r:r+1], rope, heads, kv_heads, scale, q_norm, k_norm, eps)[0].view(-1,e)
        q,k,v=x.split([heads,kv_heads,kv_heads])
        pg=int(table[s,p//16]); keys[pg,:,:,p%16]=k; values[pg,:,p%16]=v
        pages=table[s,:p//16+1].long()
        K=keys[pages].permute(1,0,3,2).flatten(1,2)[:,:p+1]; V=values[pages].permute(1,0,2,3).flatten(1,2)[:,:p+1]
        K=K.repeat_interleave(g,0); V=V.repeat_interleave(g,0)
        w=torch.einsum('he,hje->hj',q,K).softmax(-1)
        out[r]=torch.einsum('hj,hje->he',w,V).flatten()
