"""Rotary position embeddings  →  `fxopt::rope`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.kernels.rope import rope
from fxopt.rewrite.graph import dtype_of, shape_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseRoPE(Rule):
    """x * cos + rotate_half(x) * sin, queries and keys one by one

    Source: transformers.models.llama.modeling_llama.apply_rotary_pos_emb.
    """

    @staticmethod
    def pattern(x: Any, cos: Any, sin: Any, half: Any) -> Any:
        rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos) + (rotated * sin)

    @staticmethod
    def check(x: fx.Node, cos: fx.Node, sin: fx.Node, half: int) -> None:
        width = shape_of(x)[-1]
        require(len(shape_of(x)) == 4, f"the input has {len(shape_of(x))} axes, not 4")
        require(2 * half == width, f"the rotation splits {width} at {half}, not in halves")
        for name, table in (("cos", cos), ("sin", sin)):
            require(dtype_of(table) == dtype_of(x), f"{name} is {dtype_of(table)}, the input is {dtype_of(x)}")
            require(shape_of(table)[-1:] == (width,), f"{name} does not cover the last axis")

    @staticmethod
    def rewrite(x: Any, cos: Any, sin: Any) -> Any:
        return rope(x, cos, sin)


FUSE_ROPE = rules_pass("fuse_rope", FuseRoPE)
