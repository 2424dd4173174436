"""The core: a single representation of shape (n, d), its distances, visits of its pairs, and its bandwidth.

Nothing here validates or explains: that is done before. Leading batch dimensions are added by vmap, in
`devices.on_mesh` and `devices.batched`, so no other function knows of them. Where a call has several representations of
the same samples, they come as tuples, and small ones share one search (`bandwidth._find_gammas`).
"""
