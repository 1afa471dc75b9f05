"""What a released model may be said to give away of what was forgotten: residual bounds, noise, composition."""
