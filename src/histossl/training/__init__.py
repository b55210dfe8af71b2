"""How networks train: the one loop, losses, several processes, the device."""
