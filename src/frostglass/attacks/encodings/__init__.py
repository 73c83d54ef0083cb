"""Attacks on instance encodings (Mixup, InstaHide), from what an eavesdropper or a server holds."""
