"""The core: a single representation of shape (n, d), its distances, visits of its pairs, and its bandwidth.

Nothing here validates or explains: that is done before. Batch dimensions are added by vmap, in `devices.on_mesh` and
`devices.batched`, so no function here knows of them.
"""
