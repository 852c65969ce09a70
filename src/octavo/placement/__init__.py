"""Where weights and work live.

`plan` says what of a model stays on a device, what passes through it and in what order, for a number of bytes; it reads
the bytes of each part from `shapes`, what its work needs from `activations` and `costs`, what a device can do from
`cards`, and times come from `simulate`. `predictions` holds them against a real device.
"""
