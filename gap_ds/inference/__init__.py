"""Sparse inference: linear layers of a trained model in the layout that is fastest on this machine.

    layers    modules that replace an nn.Linear: compressed rows, joined, packed, 2:4
    usage     observes one run of the model and groups layers that are alike
    measure   times groups of layers in each layout
    propose   turns times into changes that promise to pay
    timing    times two variants of a run in pairs until the faster one is certain
    tuning    joins these steps in `sparsify_for_inference`; read it first

Nothing here knows of training, of engines or of files. Imports: gap_ds.masks, for the loops in C.
"""
