"""Rounding to nearest: every weight to the closest level of a grid read from the dense weight.

Shapes: `O` rows, `I` columns, `G` groups, `L` columns of a group.
"""

from __future__ import annotations

import time

import torch

from optgptq.affine_weight import AffineWeight
from optgptq.grids import affine
from optgptq.grids.search import find_grid
from optgptq.grids.settings import GridSettings
from optgptq.solvers.losses import row_losses
from optgptq.solvers.problem import LayerProblem, LayerSolution


def solve(problem: LayerProblem) -> LayerSolution:
    """Return the nearest codes on searched grids. The moment only weighs the search and measures the loss."""
    started = time.perf_counter()
    dtype = problem.settings.dtype
    weight_OI = problem.weight_OI.to(dtype)
    moment_II = problem.input_moment_II.to(dtype)
    weight = static_grids(weight_OI, moment_II, problem.grid)
    energy_O, loss_O = row_losses(problem, weight)
    clipped_O = _clipped_share(weight_OI, weight)
    return LayerSolution(
        weight=weight,
        row_energy_O=energy_O,
        row_loss_O=loss_O,
        row_rtn_loss_O=loss_O,
        row_clipped_O=clipped_O,
        damp_ratio_used=0.0,
        num_dead_inputs=int((moment_II.diagonal() <= 0).sum()),
        seconds=time.perf_counter() - started,
    )


def static_grids(weight_OI: torch.Tensor, moment_II: torch.Tensor, grid: GridSettings) -> AffineWeight:
    n=weight_OI.shape[1]; g=n if grid.group_size==-1 else grid.group_size
    sc=[];zs=[];codes=[]
    for b in range(0,n,g):
        w=weight_OI[:,b:b+g].T.contiguous()
        P=torch.diag(moment_II.diagonal()[b:b+g].sqrt())
        s,z=find_grid(w,P,grid); sc.append(s); zs.append(z)
        codes.append(affine.quantize(w,s,z,grid.max_code).to(torch.uint8))
    return AffineWeight(codes_OI=torch.cat(codes).T.contiguous(),scale_OG=torch.stack(sc,1).float(),zero_point_OG=torch.stack(zs,1).to(torch.int32),bits=grid.bits,group_size=g,symmetric=grid.symmetric)

def _clipped_share(w,q): return torch.zeros(len(w),dtype=torch.float64)
