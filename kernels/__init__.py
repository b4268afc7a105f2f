"""Triton kernels, imported as ``erd_fast.kernels`` (the folder stands at the top of the tree to be found).

One op a file, named as the op. A file imports torch, triton and its siblings only, registers nothing and
knows nothing of autograd: ``erd_fast/ops/<op>.py`` declares the op and calls in here by name at first use.
Importing this package asks for neither triton nor a GPU; importing a file of it asks for triton.

philox.py          Philox words, uniforms, normals and the order bijection: device functions for the other kernels
draw.py            sample, timestep, label drop and flip of each image of a batch
q_sample.py        stored latents to noisy input and target
diffusion_loss.py  weighted squared error of a batch, its parts and its gradient
rows.py            rows of a matrix as two blocks: device functions for the norms
residual_ada_layer_norm.py  a branch joins the residual stream, then LayerNorm modulated by sample, forward and backward
ada_layer_norm.py  the same without a branch
attention.py       softmax(q k^T) v of packed q, k and v, forward and backward
chunks.py          chunks of many tensors by their addresses: device functions for the optimizer
grad_norm.py       the norm of all gradients together
adamw_ema.py       what a step does to every parameter: unscale, clip, AdamW, averages, copy
"""
