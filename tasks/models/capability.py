"""How is computed on which device: the one table of it, by CUDA's compute capability and by what is installed.

It is pure, so that every row is tested without a card; `tasks.models.device.choices` asks it for the device that is
here. What tutorials do by hand (`flash_attention_2` and bfloat16 from 8.0 on, else eager attention and float16) is what
the rows say of dtypes; the rest, and why attention is another, stands beside them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

DtypeName = Literal["float32", "bfloat16", "float16"]
Capability = tuple[int, int]


class Choices(NamedTuple):
    """How is computed on a device.

    Attributes:
        dtype: of the base's weights and of products; where all weights are trained, of products alone.
        attention: of the implementations that transformers knows; models without it get their plain one.
        head: of the loss: our own tiles, or Liger's fused kernel for the forms of logits that it knows.
        fused_optimizer: whether AdamW is one kernel for all tensors.
        paged_states: whether an optimizer's states can move to the host when the device is full.
        tf32: whether products of float32 tensors are rounded to 10 bits of mantissa, beside weights of 16 bits.
        compile: whether layers are compiled by torch.compile.
    """

    dtype: DtypeName
    attention: Literal["sdpa"]
    head: Literal["own", "liger"]
    fused_optimizer: bool
    paged_states: bool
    tf32: bool
    compile: bool

    @property
    def four_bit_dtype(self) -> DtypeName:
        """Return what 4-bit weights are dequantized to for a product: what all other products are in.

        The table of arXiv:2305.14314 has bfloat16; with another dtype than the activations' each product would cast.
        """
        return self.dtype

    @property
    def scales_loss(self) -> bool:
        """Return whether the loss is scaled: gradients below 6e-8 are zero in float16, and bfloat16 reaches 1e-38."""
        return self.dtype == "float16"


# The same in every row:
# - attention: PyTorch's own (sdpa). From 8.0 on it is FlashAttention-2's kernel, as `flash_attention_2` is, without a
#   package to build; before that xFormers', which needs no (rows, rows) matrix either, as eager attention does. And
#   packed rows, shared prompts and prefix trees (tasks/inference/prefix_sharing.py) are calls of it: another
#   implementation would pad every batch.
# - the fused optimizer: one launch a step where PyTorch's default takes a dozen, and no temporary copies.
# - no compilation: rows of every length make a graph each, and it has not been measured to win (bench/LOG.md).
_GPU = Choices("bfloat16", "sdpa", "liger", fused_optimizer=True, paged_states=True, tf32=True, compile=False)

# No bfloat16 units: PyTorch emulates it through float32, many times slower, and says that it is supported
# (`torch.cuda.is_bf16_supported()`). So float16 with a scaled loss. Triton, and so Liger, is made for 8.0 and later;
# there is no TF32.
_HALF = _GPU._replace(dtype="float16", head="own", tf32=False)

GPUS: dict[Capability, Choices] = {
    (0, 0): _HALF._replace(dtype="float32"),  # before Volta: float16 is no faster, or 64 times slower (6.1)
    (7, 0): _HALF,  # V100: the first tensor cores, of float16 alone
    (7, 5): _HALF,  # T4, RTX 20
    (8, 0): _GPU,  # A100
    (8, 6): _GPU,  # A10, RTX 30
    (8, 9): _GPU,  # L4, L40S, RTX 40; float8 is not used: adapters are learnt on what the weights are
    (9, 0): _GPU,  # H100, H200: sdpa reaches half of FlashAttention-3 on long rows; the layers' products rule
    (10, 0): _GPU,  # B200; and later ones, until they are known to differ
}
"""By the least capability that a row is for."""

CPU = Choices("float32", "sdpa", "own", fused_optimizer=False, paged_states=False, tf32=False, compile=False)
"""bfloat16 where AMX multiplies it; the optimizer is PyTorch's default, whose bits published numbers have."""


def choose(
    capability: Capability | None, *, liger: bool = False, amx: bool = False, dtype: DtypeName | None = None
) -> Choices:
    """Choose how is computed on a device.

    Args:
        capability: (major, minor) of a GPU; None: a CPU.
        liger: whether liger-kernel is installed.
        amx: whether the CPU has a unit for products in bfloat16.
        dtype: what a user asks for instead of the row's.
    """
    if capability is None:
        row = CPU._replace(dtype="bfloat16") if amx else CPU
    else:
        row = GPUS[max(least for least in GPUS if least <= capability)]
    row = row if liger else row._replace(head="own")
    row = row._replace(dtype=dtype) if dtype else row
    return row._replace(tf32=row.tf32 and row.dtype != "float32")  # who asks for float32 wants its precision
