"""Where the cell factor starts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.networks.cell_factor import set_factor_mean, set_factor_spread, typical_factor

RARE = np.full(1000, 0.01)


def marginals_of(detection_rate, log_mean=(5.0,), log_sd=(0.5,), typical=5.0) -> Marginals:
    """Those of regions that are open in these shares of the cells, and of batches with these log depths."""
    none = torch.zeros(0)
    return Marginals(
        gene_share=none,
        region_share=none,
        inverse_dispersion=none,
        detection_rate=torch.tensor(np.asarray(detection_rate, dtype=np.float32)),
        library_log_mean=none,
        library_log_var=none,
        atac_log_mean=torch.tensor(log_mean),
        atac_log_var=torch.tensor(log_sd).square(),
        rna_log_depth_mean=0.0,
        atac_log_depth_mean=typical,
    )


def test_the_deepest_cells_are_within_reach():
    """Three standard deviations deeper than its mean a cell of the deepest batch needs d = 1, not more."""
    assert typical_factor(marginals_of(RARE)).item() == pytest.approx(math.exp(-1.5), rel=1e-5)
    two = marginals_of(RARE, log_mean=(4.9, 5.2), log_sd=(0.3, 0.5))
    assert typical_factor(two).item() == pytest.approx(math.exp(-1.7), rel=1e-5)


def test_the_most_open_regions_are_within_reach():
    """At d of a typical cell those with 90 % of detections may be open four times as often as they are."""
    common = np.r_[RARE, np.full(100, 0.095)]
    assert typical_factor(marginals_of(common)).item() == pytest.approx(0.4, rel=1e-5)
    # Of a region with 2 % of all detections it need not hold, however open it is.
    few = np.r_[np.full(4900, 0.01), 0.99]
    assert typical_factor(marginals_of(few)).item() == pytest.approx(math.exp(-1.5), rel=1e-5)


def test_the_start_is_between_a_tenth_and_a_half():
    assert typical_factor(marginals_of(RARE, log_sd=(2.0,))).item() == pytest.approx(0.1)
    assert typical_factor(marginals_of(np.full(50, 0.6))).item() == 0.5
    assert typical_factor(marginals_of(RARE, log_sd=(0.1,))).item() == 0.5


def test_the_start_does_not_depend_on_blocks_or_order(make_cells):
    cells = [make_cells(), make_cells(n=(2, 6, 9))]
    together, apart = Marginals.of(cells, n_batch=2), Marginals.of(cells[::-1], n_batch=2)
    assert typical_factor(together) == typical_factor(apart)
    rate = together.detection_rate
    assert typical_factor(replace(together, detection_rate=rate.flip(0))) == typical_factor(together)


def test_a_program_starts_with_the_typical_factor(make_program):
    """A cell of typical depth has it, its prior is around it, and the prior of later batches is as wide."""
    program = make_program()
    marginals = marginals_of(np.full(9, 0.1), log_mean=(5.0, 5.4), log_sd=(0.5, 0.2), typical=5.1)
    marginals = replace(
        marginals,
        gene_share=torch.full((7,), 1 / 7),
        inverse_dispersion=torch.ones(7),
        library_log_mean=torch.zeros(2),
        library_log_var=torch.ones(2),
    )
    program.start_from(marginals)
    d = typical_factor(marginals)
    torch.testing.assert_close(program.cell_factor_offset.sigmoid(), d)
    torch.testing.assert_close(program.cell_factor_loc.detach(), torch.logit(d) + torch.tensor([-0.1, 0.3]))
    # d / dlogit of log d is 1 - d.
    torch.testing.assert_close((1 - d) * program.cell_factor_sd, torch.tensor([0.5, 0.2]))
    set_factor_spread(program, replace(marginals, atac_log_var=torch.tensor([9.0, 0.16])), first=1)
    torch.testing.assert_close((1 - d) * program.cell_factor_sd, torch.tensor([0.5, 0.4]))


def test_the_start_is_saved_with_a_model(tmp_path):
    """Factors of cells are the same after loading, and the start stays where training found it."""
    adata = pm.simulate_multiome((60, 20, 20), n_genes=30, n_regions=200, seed=3)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2, seed=0)
    model.train(max_epochs=2, progress_bar=False)
    model.program.cell_factor_offset.fill_(-1.3)
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata)
    assert loaded.program.cell_factor_offset.item() == pytest.approx(-1.3)
    for kind, found in loaded.get_library_size_factors().items():
        np.testing.assert_allclose(found, model.get_library_size_factors()[kind], rtol=1e-6)


def test_regions_that_were_not_measured_tell_nothing_of_the_factor(make_program, make_cells):
    """A cell with the same counts in a part of the regions is deeper, but its factor is no better known."""
    program, cells = make_program(), make_cells()
    program.atac_typical.copy_(torch.rand(2, 9, generator=torch.Generator().manual_seed(0)))
    panels = Panels(torch.tensor([[True] * 4 + [False] * 5]), torch.zeros(len(cells), dtype=torch.int64))
    y = cells.y.to_dense()
    y[:, 4:] = 0
    some = cells.replace(y=y, atac_panels=panels)
    hidden = program.encode(some, some.design)
    q = program.cell_factor_posterior(some, some.design, hidden)
    d, prior = program.cell_factor(some, hidden), program.cell_factor_prior(some, some.design)
    precision = prior.scale**-2 + (y > 0).sum(1) * (1 - d).square()
    expected = torch.where(cells.has_atac, program.cell_factor_log_scale.exp() / precision.sqrt(), prior.scale)
    torch.testing.assert_close(q.scale, expected)


def test_known_factors_say_what_a_typical_cell_has(make_cells):
    cells = make_cells()
    known = torch.linspace(0.6, 0.9, len(cells))
    marginals = Marginals.of([cells.replace(atac_size=known)], n_batch=2)
    assert typical_factor(marginals).item() == pytest.approx(known[cells.has_atac].mean().item())
    assert Marginals.of([cells], n_batch=2).atac_size_mean is None


def rows(cells: Cells, which: slice) -> Cells:
    parts = ("index", "has_rna", "has_atac", "design", "label")
    counts = {name: getattr(cells, name).to_dense()[which] for name in ("x", "y")}
    return cells.replace(**counts, **{name: getattr(cells, name)[which] for name in parts})


def test_later_batches_take_the_mean_of_their_cells(make_program, make_cells):
    """Of cells with ATAC, however they are cut; a batch without any keeps what it has."""
    program, cells = make_program(), make_cells(n=(9, 4, 7))
    before = program.cell_factor_loc.detach().clone()
    logit = program.cell_factor(cells, program.encode(cells, cells.design)).logit()
    of_second = cells.has_atac & (cells.design[:, 1] == 1)
    for blocks in ([cells], [rows(cells, slice(6)), rows(cells, slice(6, None))]):
        set_factor_mean(program, blocks, first=1)
        torch.testing.assert_close(program.cell_factor_loc[1], logit[of_second].mean())
    set_factor_mean(program, [make_cells(n=(0, 6, 0))], first=0)
    torch.testing.assert_close(program.cell_factor_loc[0], before[0])
    torch.testing.assert_close(program.cell_factor_loc[1], logit[of_second].mean())
