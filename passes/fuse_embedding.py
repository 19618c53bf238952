"""The embedding of the tokens  →  `fxopt::embedding`, whose gradient is summed in float32."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxopt.kernels.embedding import embedding
from fxopt.rewrite.graph import value_of
from fxopt.rewrite.match import Rule, require
from fxopt.rewrite.pipeline import rules_pass


class FuseEmbedding(Rule):
    """embedding(ids, weight), in a two-byte dtype on a CPU, where torch sums the gradient in that dtype

    Source: torch.nn.Embedding.forward.
    """

    keeps_no_result = True

    @staticmethod
    def pattern(
        ids: Any, weight: Any, padding_idx: Any, max_norm: Any, norm_type: Any, by_frequency: Any, sparse: Any
    ) -> Any:
        return F.embedding(ids, weight, padding_idx, max_norm, norm_type, by_frequency, sparse)

    @staticmethod
    def check(weight: fx.Node, padding_idx: Any, max_norm: Any, by_frequency: Any, sparse: Any) -> None:
        value = value_of(weight)
        is_concerned = value.device.type == "cpu" and value.element_size() == 2 and value.requires_grad
        require(is_concerned and not is_traceable_wrapper_subclass(value), "")
        require(value.shape[-1] > 0, "")
        require(max_norm is None, "max_norm shortens the rows in place")
        require(not by_frequency, "the gradient is scaled by each token's frequency")
        require(not sparse, "the gradient is sparse")

    @staticmethod
    def rewrite(ids: Any, weight: Any, padding_idx: Any) -> Any:
        return embedding(ids, weight, padding_idx)


FUSE_EMBEDDING = rules_pass("fuse_embedding", FuseEmbedding)
