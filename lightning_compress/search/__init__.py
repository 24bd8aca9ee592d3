"""Methods that join techniques: one budget for several of them, and which layers suit which."""
