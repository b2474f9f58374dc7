"""Setup of extra modalities: where they lie, and what counts of proteins have to be."""
