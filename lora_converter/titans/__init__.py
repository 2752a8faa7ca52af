"""What both torchtitans need: changes to a host, CPU ranks, and what a trainer's parts gain over a `Run`.

`titan/` and `titan03/` use it. What is imported from torchtitan here is in both.
"""
