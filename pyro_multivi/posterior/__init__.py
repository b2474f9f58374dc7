"""What a trained program says of cells: tensors in, arrays out."""
