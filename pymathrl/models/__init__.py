"""Models: the decoder, its tokenizer, and checkpoints in and out."""

from pymathrl.models.config import ModelConfig, Rope, rope_table
from pymathrl.models.critic import Critic
from pymathrl.models.decoder import Decoder
from pymathrl.models.load import Policy, load, new_policy, save
from pymathrl.models.tokenizer import Tokenizer, char_tokenizer

__all__ = [
    "Critic",
    "Decoder",
    "ModelConfig",
    "Policy",
    "Rope",
    "Tokenizer",
    "char_tokenizer",
    "load",
    "new_policy",
    "rope_table",
    "save",
]
