"""Programs for the centre and the bench: inferhub, loadgen, the demo."""
