"""The Triton backend: one file an op, launcher and kernel of the same name. Installed as `sparseft.kernels`."""

from sparseft.kernels.adamw import adamw_
from sparseft.kernels.delta_swap import delta_swap_
from sparseft.kernels.fisher_linear import fisher_linear_
from sparseft.kernels.fisher_linears import fisher_linears_
from sparseft.kernels.fisher_segments import fisher_segments_
from sparseft.kernels.gather import gather
from sparseft.kernels.lion import lion_
from sparseft.kernels.outer_at import outer_at
from sparseft.kernels.selected_grad import selected_grad_
from sparseft.kernels.sgd import sgd_
from sparseft.kernels.topk_indices import topk_indices

__all__ = [
    "adamw_",
    "delta_swap_",
    "fisher_linear_",
    "fisher_linears_",
    "fisher_segments_",
    "gather",
    "lion_",
    "outer_at",
    "selected_grad_",
    "sgd_",
    "topk_indices",
]
