"""Attention kernels in Pallas, one file each; every one is tested against
`model.attention.plain_attention`."""
