"""The training loop, losses, several processes, and the choice of the device."""
