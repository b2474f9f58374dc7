"""Words that the data carry: kinds of features and of cells."""

from __future__ import annotations

#: Values of ``var["feature_types"]``, as Cell Ranger writes them.
GENES = "Gene Expression"
PEAKS = "Peaks"

#: Values of ``obs["modality"]``: which modalities a cell was measured in.
PAIRED = "paired"
EXPRESSION = "expression"
ACCESSIBILITY = "accessibility"
MODALITIES = (PAIRED, EXPRESSION, ACCESSIBILITY)
