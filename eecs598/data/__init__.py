"""Images and boxes: from files on disk to the items that a training run asks for."""
