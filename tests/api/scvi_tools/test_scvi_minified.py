"""Minified data: only the posterior is left, and every posterior quantity is what it was."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_multivi as scvi
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data._constants import ADATA_MINIFY_TYPE
from pyro_multivi.data._utils import _is_minified
from pyro_multivi.data.minified.layout import stored_part
from pyro_multivi.model import MULTIVI
from pyro_multivi.networks.cell_factor import unlearned_cell_factor
from pyro_multivi.posterior.quantities.file_sink import digest
from pyro_multivi.program import MultiVIProgram


def made(mudata=False, size_factors=False, train=True, **choices):
    data = scvi.simulate_multiome((60, 25, 25), 20, 30, n_batches=2, n_types=2, seed=0, return_mudata=mudata)
    given = {"batch_key": "batch"}
    if size_factors:
        data.obs["rna_size"], data.obs["atac_size"] = 1.5, np.linspace(0.2, 0.9, data.n_obs)
        given["size_factor_key"] = ["rna_size", "atac_size"]
    if mudata:
        MULTIVI.setup_mudata(data, **given)
    else:
        data.layers["copy"] = data.X.copy()
        MULTIVI.setup_anndata(data, modality_key="modality", **given)
    model = MULTIVI(data, n_hidden=6, n_latent=2, **choices)
    if train:
        model.train(2, enable_progress_bar=False)
    model.is_trained = True
    return data, model


def minify(model):
    (model.minify_mudata if model.spec.kind == "mudata" else model.minify_adata)()


def quantities(model, **given):
    """Every posterior quantity that needs no counts, by name."""
    found = {}
    for modality in ("joint", "expression", "accessibility"):
        mean, variance = model.get_latent_representation(**given, modality=modality, return_dist=True)
        drawn = model.get_latent_representation(**given, modality=modality, give_mean=False, n_samples=3)
        found |= {f"{modality} mean": mean, f"{modality} variance": variance, f"{modality} draws": drawn}
    found |= {f"depth {name}": values for name, values in model.get_library_size_factors(**given).items()}
    array = {"return_numpy": True, **given}
    found["rho"] = model.get_normalized_expression(**array, library_size="latent", transform_batch="batch_1")
    found["rho draws"] = model.get_normalized_expression(**array, library_size="latent", n_samples=5)
    found["p"] = model.get_normalized_accessibility(**array, normalize_cells=True, normalize_regions=True)
    found["p sd"] = model.get_normalized_accessibility(**given, n_samples=30, return_interval=0.9).sd.to_numpy()
    found["counts"] = model.posterior_predictive_sample(**given, n_samples=2)["x"][1].toarray()
    for test in (model.differential_expression, model.differential_accessibility):
        table = test(**given, groupby="cell_type", unit="cell", all_stats=False, n_samples=40)
        found[test.__name__] = table.select_dtypes("number").to_numpy()
    return found


@pytest.mark.parametrize(
    "choices",
    [
        {"modality_weights": "cell", "latent_distribution": "ln"},
        {"library": "observed", "gene_likelihood": "nb", "modality_weights": "universal"},
        {"mudata": True},
        {"size_factors": True, "region_factors": False},
    ],
    ids=str,
)
def test_every_posterior_quantity_stays_the_same(choices, tmp_path):
    data, model = made(**{"region_factors": True, **choices})
    if not model.program.config.region_factors:
        model.get_normalized_accessibility = lambda **given: MULTIVI.get_normalized_accessibility(
            model, **{**given, "normalize_regions": False}
        )
    cells = data.obs_names[[2, 70, 95]].tolist()
    before, some = quantities(model), model.get_latent_representation(indices=cells)
    minify(model)
    assert model.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR
    # Sums of an encoder's products round by how many cells are encoded together; the posterior was encoded with all.
    for name, values in quantities(model).items():
        rounding = {"rtol": 1e-3, "atol": 1e-6} if name.startswith("differential") else {"rtol": 0}
        np.testing.assert_allclose(values, before[name], err_msg=name, **rounding)
    np.testing.assert_allclose(model.get_latent_representation(indices=cells), some, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model", save_anndata=True)
    loaded = MULTIVI.load(tmp_path / "model")
    assert loaded.minified_data_type == ADATA_MINIFY_TYPE.LATENT_POSTERIOR
    np.testing.assert_array_equal(loaded.get_latent_representation(), before["joint mean"]
                                  if loaded.program.config.latent_distribution == "normal"
                                  else model.get_latent_representation())  # fmt: skip


@pytest.mark.parametrize("mudata", [False, True])
def test_only_the_posterior_is_left_of_the_cells(mudata):
    data, model = made(mudata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # mudata, of its own calls
        before = data.copy()
    minify(model)
    assert model.adata is not data
    assert (_is_minified(data), _is_minified(model.adata)) == (False, True)
    parts = model.adata.mod.values() if mudata else [model.adata]
    for part in parts:
        assert part.X.nnz == 0
        assert all(layer.nnz == 0 for layer in part.layers.values())
        assert part.raw is None
    assert set(model.adata.obs) - set(before.obs) == {"observed_lib_size"}
    rna = before.mod["rna"].X if mudata else before.X[:, :20]
    totals = model.adata.obs["observed_lib_size"].to_numpy()
    has_rna = totals > 0
    assert has_rna.sum() == 85
    np.testing.assert_array_equal(totals[has_rna], np.ravel(rna.sum(1))[: len(has_rna)][np.ravel(rna.sum(1)) > 0])
    assert model.adata.var_names.equals(before.var_names)
    # The object of the user is as it was.
    assert data.uns["pyro_multivi"] == before.uns["pyro_multivi"]
    assert set(data.obsm) == set(before.obsm)
    assert (data.mod["rna"].X if mudata else data.X).nnz == rna.nnz or not mudata


def test_whole_numbers_in_tables_of_a_mudata_are_kept():
    """At which the copy of mudata 0.3 fails, as it would set them to NaN."""
    data, model = made(mudata=True)
    data.obsm["place"], data.varm["rank"] = np.arange(2 * data.n_obs).reshape(-1, 2), np.arange(data.n_vars)[:, None]
    model.minify_mudata()
    for name, key in (("obsm", "place"), ("varm", "rank")):
        before, after = getattr(data, name)[key], getattr(model.adata, name)[key]
        assert after.dtype == before.dtype
        assert after is not before
        np.testing.assert_array_equal(after, before)


def test_a_backed_mudata(tmp_path):
    data, model = made(mudata=True)
    with mudata_as_given() as mudata:
        data.write(tmp_path / "data.h5mu")
        model.adata = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
    before = model.get_latent_representation()
    model.minify_mudata()
    assert not model.adata.isbacked
    np.testing.assert_array_equal(model.get_latent_representation(), before)


@pytest.fixture(scope="module")
def minified():
    data, model = made()
    minify(model)
    return data, model


@pytest.mark.parametrize("method", ["get_elbo", "get_reconstruction_error", "get_marginal_ll"])
def test_likelihoods_need_counts(minified, method):
    data, model = minified
    with pytest.raises(
        ValueError, match=rf"^The VAEMixin.{method} function currently does not support minified data\.(\n|$)"
    ):
        getattr(model, method)()
    assert model.get_elbo(data) < 0  # that has them


@pytest.mark.parametrize(
    "method", ["impute", "posterior_predictive_check", "to_inference_data", "minibatch", "train", "DE", "DE stats"]
)
def test_what_else_needs_counts(minified, method):
    model = minified[1]
    given = {"groupby": "cell_type", "unit": "cell"} if method.endswith("stats") else {"groupby": "cell_type"}
    call = getattr(model, method, lambda: model.differential_expression(**given))
    with pytest.raises(ValueError, match="This needs the counts, which minified data have not: give"):
        call()


def test_what_cannot_be_minified(minified):
    data, model = minified
    with pytest.raises(ValueError, match="minify_adata: the data of this model are minified already"):
        model.minify_adata()
    with pytest.raises(ValueError, match="These data are minified, without counts: load the model"):
        MULTIVI(model.adata)
    fresh = MULTIVI(data, n_hidden=6, n_latent=2)
    with pytest.raises(scvi.NotTrainedError):
        fresh.minify_adata()
    fresh.train(1, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"minify_mudata: .* of the other kind: call minify_adata\(\)"):
        fresh.minify_mudata()
    with pytest.raises(ValueError, match="keeps counts, by which nothing gets smaller"):
        fresh.minify_adata("latent_posterior_parameters_with_counts")
    with pytest.raises(ValueError, match=r"minified_data_type='x' is not allowed: choose one of 'latent"):
        fresh.minify_adata("x")
    with pytest.raises(ValueError, match="These data were minified by another model, or by this one before"):
        fresh.get_latent_representation(model.adata)


class Own(MultiVIProgram):
    """A guide with a latent of its own."""

    def guide_extra(self, cells, s):
        """Nothing yet."""


def test_a_guide_of_ones_own_is_not_minified():
    _, model = made(program_class=Own)
    with pytest.raises(ValueError, match="minify_adata: Own has a guide_extra of its own"):
        model.minify_adata()


class Offset(MultiVIProgram):
    """A latent of each cell beside its library size, in the methods of that."""

    def library_prior(self, cells, s):
        offset = pyro.sample("offset", dist.Normal(torch.zeros(len(cells)), 0.1))
        loc, scale = self.library_moments(s)
        return dist.LogNormal(loc + offset, scale)

    def library_posterior(self, cells, s, hidden):
        pyro.sample("offset", dist.Normal(torch.zeros(len(cells)), 0.1))
        return super().library_posterior(cells, s, hidden)


def test_a_guide_with_another_latent_is_not_minified():
    _, model = made(program_class=Offset, train=False)
    with pytest.raises(ValueError, match="The guide of Offset draws 'offset' beside z, l and d"):
        model.minify_adata()


class GammaLibrary(MultiVIProgram):
    """q(l) is a Gamma."""

    def library_posterior(self, cells, s, hidden):
        q = super().library_posterior(cells, s, hidden)
        return dist.Gamma(q.scale**-2, q.scale**-2 / q.loc.exp())


class BetaFactor(MultiVIProgram):
    """q(d) is a Beta."""

    def cell_factor_posterior(self, cells, s, hidden):
        q = super().cell_factor_posterior(cells, s, hidden)
        d, n = q.loc.sigmoid(), 20 / q.scale
        return dist.Beta(n * d, n * (1 - d))


class LogNormalFactor(MultiVIProgram):
    """q(d) is a LogNormal, of the family that fragments have."""

    def cell_factor_posterior(self, cells, s, hidden):
        q = super().cell_factor_posterior(cells, s, hidden)
        return dist.LogNormal(q.loc.sigmoid().log(), 0.01 * q.scale)


class CorrelatedState(MultiVIProgram):
    """q(z) is of a family that may have a covariance."""

    def mix(self, experts):
        loc, scale = self.averaged(experts)
        return dist.MultivariateNormal(loc, scale_tril=scale.diag_embed())


@pytest.mark.parametrize(
    ("program_class", "says"),
    [
        (GammaLibrary, r"minify_adata: The guide of GammaLibrary has a Gamma for 'l', .* can hold LogNormal\. Keep"),
        (BetaFactor, "a Beta for 'd', .* can hold LogitNormal or Delta"),
        (LogNormalFactor, "a LogNormal for 'd', .* can hold LogitNormal or Delta"),
        (CorrelatedState, r"a MultivariateNormal for 'z', .* can hold Normal\(\.\.\.\)"),
    ],
)
def test_a_posterior_of_another_family_is_not_minified(program_class, says):
    data, model = made(program_class=program_class)
    with pytest.raises(ValueError, match=says):
        model.minify_adata()
    assert model.adata is data
    assert model.minified_data_type is None


def test_another_posterior_in_minified_data_is_found_out():
    _, model = made()
    minify(model)
    before = model.get_latent_representation()
    stored = model.adata.obsm["pyro_multivi_posterior"]
    model.adata.obsm["pyro_multivi_posterior"] = stored.copy()
    stored_part(model.adata.obsm["pyro_multivi_posterior"], "z")[3] += 1
    with pytest.raises(ValueError, match="changed in place since it read them: their stored posterior is another"):
        model.get_latent_representation()
    model.adata.obsm["pyro_multivi_posterior"] = stored
    np.testing.assert_array_equal(model.get_latent_representation(), before)


def test_minified_data_and_saved_models(minified, tmp_path):
    data, model = minified
    other = MULTIVI(data, n_hidden=6, n_latent=2)
    other.train(1, enable_progress_bar=False)
    other.save(tmp_path / "whole")
    said = "^It appears you are trying to load a non-minified model with minified adata(\n|$)"
    for kind in (ValueError, KeyError):  # the latter up to scvi-tools 1.3
        with pytest.raises(kind, match=said):
            MULTIVI.load(tmp_path / "whole", model.adata)
    other.minify_adata()
    other.save(tmp_path / "small")
    with pytest.raises(ValueError, match="These data were minified by another model"):
        MULTIVI.load(tmp_path / "small", model.adata)
    with_counts = MULTIVI.load(tmp_path / "small", data)
    assert with_counts.minified_data_type is None
    with_posterior = MULTIVI.load(tmp_path / "small", other.adata[10:40].copy())
    assert with_posterior.minified_data_type == "latent_posterior_parameters"
    np.testing.assert_array_equal(
        with_posterior.get_latent_representation(), other.get_latent_representation(indices=np.arange(10, 40))
    )
    del other.adata.obsm["pyro_multivi_posterior"]
    with pytest.raises(ValueError, match=r"minified, but obsm\['pyro_multivi_posterior'\] .* is not there"):
        MULTIVI.load(tmp_path / "small", other.adata)


def test_data_that_an_earlier_version_minified_keep_their_points(tmp_path):
    """Then d had no posterior: models had no tensors of it, and of cells d itself was stored."""
    _, model = made()
    later = unlearned_cell_factor(2)
    model.program.load_state_dict({**model.program.state_dict(), **later})
    model.minify_adata()
    points = np.linspace(0.1, 0.9, model.adata.n_obs, dtype=np.float32)
    start = 2 + 2 + 2
    adata = model.adata.copy()
    stored = adata.obsm["pyro_multivi_posterior"][:, :-1].copy()
    stored[:, start] = points
    adata.obsm["pyro_multivi_posterior"] = stored
    state = model.program.state_dict()
    earlier = digest({}, *(value for name, value in state.items() if name not in later))
    adata.uns["pyro_multivi"]["minified_by"] = earlier
    model.adata = adata
    model.save(tmp_path / "model", save_anndata=True)
    loaded = MULTIVI.load(tmp_path / "model")
    np.testing.assert_allclose(stored_part(stored, "factor")[:, 0], points)
    d = loaded.get_library_size_factors()["accessibility"]
    has_atac = loaded.adata.obs["modality"] != "expression"
    np.testing.assert_allclose(d[has_atac], points[has_atac], rtol=1e-6)
    assert np.isfinite(loaded.get_normalized_accessibility(n_samples=3, normalize_cells=True, return_numpy=True)).all()
    # Of a model that has learned something of d since, it is the posterior no more.
    with torch.no_grad():
        model.program.cell_factor_loc += 0.1
    model.save(tmp_path / "other")
    with pytest.raises(ValueError, match="minified by another model"):
        MULTIVI.load(tmp_path / "other", model.adata)
