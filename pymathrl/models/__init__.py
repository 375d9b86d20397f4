"""Models: the decoder, its tokenizer, and checkpoints in and out."""

from pymathrl.models.decoder import Cache, Decoder, ModelConfig
from pymathrl.models.load import Policy, load, new_policy, save
from pymathrl.models.tokenizer import Tokenizer, char_tokenizer

__all__ = ["Cache", "Decoder", "ModelConfig", "Policy", "Tokenizer", "char_tokenizer", "load", "new_policy", "save"]
