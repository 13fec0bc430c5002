"""What all trainings share: the loop that can be resumed, and the optimizers."""
