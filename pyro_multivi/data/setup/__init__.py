"""Setup: where counts and covariates lie in an AnnData or MuData, checked and read into tensors."""
