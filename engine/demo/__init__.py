"""The demo model and the world of synthetic documents that it was trained on."""
