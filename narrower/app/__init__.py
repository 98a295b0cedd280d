"""The commands, without printing: each takes a `Job` (settings, images, run folder, device, reporter).

`prune` traces the network, scores its channels, measures the damage of each group, plans, narrows, verifies, repairs the
weights that stay, and fine-tunes. The network is evaluated dense and after each stage that changes it.
"""
