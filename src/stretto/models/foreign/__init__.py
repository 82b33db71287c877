"""Models that Stretto doesn't ship, wrapped as stacks: yours (``ForeignStack``) or Hugging Face's."""

from stretto.models.foreign.hugging_face import from_hugging_face
from stretto.models.foreign.load import load_foreign
from stretto.models.foreign.stack import ForeignStack
from stretto.models.foreign.tensor_rules import derive_tensor_rules

__all__ = ["ForeignStack", "derive_tensor_rules", "from_hugging_face", "load_foreign"]
