"""What makes a model fast or small, on real clicks: late interaction, early exit, the pruned file of int8."""
