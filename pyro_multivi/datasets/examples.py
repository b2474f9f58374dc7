"""Real cells that come with the package."""

from __future__ import annotations

from importlib.resources import as_file, files

import anndata
from anndata import AnnData


def cell_lines() -> AnnData:
    """A mixture of four human cell lines, RNA and ATAC measured in the same cells.

    SNARE-seq of BJ, GM12878, H1 and K562 (Chen et al. 2019, `GSE126074
    <https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc=GSE126074>`_), taken from the scPECA 2.0 wheel on PyPI
    (MIT licence, its text lies beside the file). The 3000 genes of highest variance and the 12 000 regions
    of highest loading were chosen on these very cells, without their labels: good for
    demonstrations and tests, not for figures. GRCh38.

    Returns
    -------
    AnnData
        1047 cells x 15 000 features, genes first. ``X`` holds raw counts (csr float32), all cells are
        paired; ``obs["cell_type"]`` is the cell line, ``var["feature_types"]`` is Gene Expression or
        Peaks. One library: there is no batch. A new copy each time.

    Examples
    --------
    >>> adata = cell_lines()
    >>> adata.shape
    (1047, 15000)
    >>> sorted(adata.obs["cell_type"].unique())
    ['BJ', 'GM12878', 'H1', 'K562']
    """
    with as_file(files("pyro_multivi.datasets").joinpath("files", "snare_cell_lines_demo.h5ad")) as path:
        return anndata.read_h5ad(path)
