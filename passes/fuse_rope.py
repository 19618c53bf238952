"""Rotary position embeddings  →  `fxopt::rope`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.kernels.rope import rope
from fxopt.rewrite.graph import cast, dtype_of, shape_of, value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseRoPE(Rule):
    """x * cos + rotate_half(x) * sin, queries and keys one by one; in float32 where the tables or the casts say so

    Source: transformers.models.llama.modeling_llama.apply_rotary_pos_emb; with casts, that of olmo2 and modernbert.
    """

    op = "rope"

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, half: Any, wide: Any, before: Any, after: Any, dtype: Any) -> Any:
        h = x.to(before)
        rotated = torch.cat((-h[..., half:], h[..., :half]), dim=-1).to(after)
        return (x.to(wide) * cos + rotated * sin).to(dtype)

    @staticmethod
    def check(x: fx.Node, cos: fx.Node, sin: fx.Node, half: int, dtype: torch.dtype) -> None:
        check_rotation(x, cos, sin, dtype)
        require(isinstance(half, int), "the rotation splits at a size that varies")
        require(2 * half == shape_of(x)[-1], f"the rotation splits {shape_of(x)[-1]} at {half}, not in halves")

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, sin)


def check_rotation(x: fx.Node, cos: fx.Node, sin: fx.Node, dtype: torch.dtype, width: int | None = None) -> None:
    """What all rotations need: at most four axes, a result that is not narrower, tables that x need not grow for.

    The tables' last axis has `width` numbers, as many as x by default.
    """
    shape = shape_of(x)
    require(len(shape) <= 4, f"the input has {len(shape)} axes")
    wider = torch.promote_types(value_of(x).dtype, dtype) == dtype
    require(wider, f"the result is {dtype}, the input is {dtype_of(x)}")
    for name, table in (("cos", cos), ("sin", sin)):
        require(
            shape_of(table)[-1:] == (shape[-1] if width is None else width,), f"{name} does not cover the last axis"
        )
        fits = len(shape_of(table)) <= len(shape) and all(
            size in (1, of_x) for size, of_x in zip(shape_of(table)[-2::-1], shape[-2::-1], strict=False)
        )
        require(fits, f"{name} {shape_of(table)} has more rows than the input {shape}")


def check_half_rotation(x: fx.Node, cos: fx.Node, sin: fx.Node, dtype: torch.dtype) -> None:
    """The same for tables of half the width, where the parts of x are rotated one by one."""
    require(shape_of(x)[-1] % 2 == 0, f"{shape_of(x)[-1]} numbers are no pairs")
    check_rotation(x, cos, sin, dtype, width=shape_of(x)[-1] // 2)


def check_pairs(x: fx.Node, *sizes: Any) -> None:
    """Decline where `sizes`, to which x is reshaped, are other than its own with pairs for the last."""
    wanted = (*shape_of(x)[:-1], shape_of(x)[-1] // 2)
    found = tuple(value_of(size) for size in sizes)
    same = len(found) == len(wanted) and all(size in (-1, own) for size, own in zip(found, wanted, strict=True))
    require(same, f"{shape_of(x)} is reshaped to {(*found, 2)}, which are not its pairs")


class FuseNegativeRoPE(FuseRoPE):
    """x * cos - rotate_half(x) * sin: the same rotation the other way round

    Source: transformers.models.nanochat.modeling_nanochat.rotate_half.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, half: Any, wide: Any, before: Any, after: Any, dtype: Any) -> Any:
        h = x.to(before)
        rotated = torch.cat((h[..., half:], -h[..., :half]), dim=-1).to(after)
        return (x.to(wide) * cos + rotated * sin).to(dtype)

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, -sin)


class FuseChunkedRoPE(FuseRoPE):
    """The same with the halves from `chunk`

    Source: modelling code outside transformers, as that of ChatGLM and of GPT-NeoX's forks.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, wide: Any, before: Any, after: Any, dtype: Any) -> Any:
        halves = torch.chunk(x.to(before), 2, dim=-1)
        rotated = torch.cat((-halves[1], halves[0]), dim=-1).to(after)
        return (x.to(wide) * cos + rotated * sin).to(dtype)

    @staticmethod
    def check(x: fx.Node, cos: fx.Node, sin: fx.Node, dtype: torch.dtype) -> None:
        check_rotation(x, cos, sin, dtype)


class FusePairsRoPE(FuseRoPE):
    """x * cos + rotate(x) * sin, where neighbours rotate with each other

    Source: transformers.models.gptj.modeling_gptj.rotate_every_two; with casts, apply_rotary_pos_emb of cohere.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, wide: Any, before: Any, after: Any, dtype: Any) -> Any:
        h = x.to(before)
        rotated = torch.stack((-h[..., 1::2], h[..., ::2]), dim=-1).flatten(-2).to(after)
        return (x.to(wide) * cos + rotated * sin).to(dtype)

    @staticmethod
    def check(x: fx.Node, cos: fx.Node, sin: fx.Node, dtype: torch.dtype) -> None:
        check_rotation(x, cos, sin, dtype)

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, sin, layout="pairs")


class FuseHalvesRoPE(FusePairsRoPE):
    """The two halves of the result one by one, from tables of half the width

    Source: transformers.models.gpt_oss.modeling_gpt_oss._apply_rotary_emb.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        first, second = torch.chunk(x, 2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)

    check = staticmethod(check_half_rotation)

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, sin)


class FuseSlicedHalvesRoPE(FuseHalvesRoPE):
    """The same with the halves as slices"""

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, half: Any, dtype: Any) -> Any:
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)

    @staticmethod
    def check(x: fx.Node, cos: fx.Node, sin: fx.Node, half: int, dtype: torch.dtype) -> None:
        check_half_rotation(x, cos, sin, dtype)
        require(half == shape_of(x)[-1] // 2, f"the rotation splits {shape_of(x)[-1]} at {half}, not in halves")


class FuseNegativeSlicedHalvesRoPE(FuseSlicedHalvesRoPE):
    """The same the other way round

    Source: nanochat.gpt.apply_rotary_emb.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, half: Any, dtype: Any) -> Any:
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos + second * sin, first * -sin + second * cos), dim=-1).to(dtype)

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, -sin)


class FuseSlicedPairsRoPE(FusePairsRoPE):
    """Neighbours rotate with each other, one by one, and are stacked again"""

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(dtype)

    check = staticmethod(check_half_rotation)


class FuseStackedPairsRoPE(FusePairsRoPE):
    """The same with neighbours as an axis of their own

    Source: torchtune.modules.RotaryPositionalEmbeddings.forward.
    """

    @staticmethod
    def pattern(
        x: Any, cos: Any, sin: Any, wide: Any, batch: Any, heads: Any, length: Any, pairs: Any, dtype: Any
    ) -> Any:
        both = x.to(wide).reshape((batch, heads, length, pairs, 2))
        first, second = both[..., 0], both[..., 1]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(dtype)

    @staticmethod
    def check(
        x: fx.Node, cos: fx.Node, sin: fx.Node, batch: Any, heads: Any, length: Any, pairs: Any, dtype: torch.dtype
    ) -> None:
        check_half_rotation(x, cos, sin, dtype)
        check_pairs(x, batch, heads, length, pairs)


class FuseUnboundPairsRoPE(FuseStackedPairsRoPE):
    """The same with `unbind`

    Source: llama2.c's model.apply_rotary_emb.
    """

    @staticmethod
    def pattern(
        x: Any, cos: Any, sin: Any, wide: Any, batch: Any, heads: Any, length: Any, pairs: Any, dtype: Any
    ) -> Any:
        both = torch.unbind(x.to(wide).reshape((batch, heads, length, pairs, 2)), -1)
        first, second = both[0], both[1]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2).to(dtype)


class FusePairsToHalvesRoPE(FusePairsRoPE):
    """Neighbours rotate with each other, and go to the two halves of the result

    Source: transformers.models.deepseek_v3.modeling_deepseek_v3.apply_rotary_pos_emb_interleave.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype)

    check = staticmethod(check_half_rotation)

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), cos, sin, layout="pairs_to_halves")


class FuseComplexRoPE(FuseRoPE):
    """The product of neighbours as a complex number with e^(i * angle)

    Source: transformers.models.llama4.modeling_llama4.apply_rotary_emb.
    """

    @staticmethod
    def pattern(x: Any, rotation: Any, wide: Any, pairs: Any, batch: Any, length: Any, heads: Any, dtype: Any) -> Any:
        numbers = torch.view_as_complex(x.to(wide).reshape((batch, length, heads, pairs, 2)))
        return torch.view_as_real(numbers * rotation).flatten(-2).to(dtype)

    @staticmethod
    def check(
        x: fx.Node, rotation: fx.Node, pairs: Any, batch: Any, length: Any, heads: Any, dtype: torch.dtype
    ) -> None:
        require(value_of(rotation).is_complex(), "the rotation is not complex")
        check_half_rotation(x, rotation, rotation, dtype)
        check_pairs(x, batch, length, heads, pairs)

    @staticmethod
    def rewrite(x: Any, rotation: Any, dtype: Any) -> Any:
        return rope(cast(x, dtype), torch.real(rotation), torch.imag(rotation), layout="pairs")


FUSE_ROPE = rules_pass(
    "fuse_rope",
    FuseRoPE,
    FuseNegativeRoPE,
    FuseChunkedRoPE,
    FusePairsRoPE,
    FuseHalvesRoPE,
    FuseSlicedHalvesRoPE,
    FuseNegativeSlicedHalvesRoPE,
    FuseSlicedPairsRoPE,
    FuseStackedPairsRoPE,
    FuseUnboundPairsRoPE,
    FusePairsToHalvesRoPE,
    FuseComplexRoPE,
)
