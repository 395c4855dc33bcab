"""The model: config, weights, layers, graphs, sampler.

Layers that keep a state
------------------------

What a holder calls a layer is a mixer: one attention or one state layer. A layer of a checkpoint has one, or two side
by side (Falcon-H1), or none where it is an MLP alone (Nemotron-H). The decoder's `MixerWeights` is a mixer with all
that follows it up to the next one, so an MLP alone costs no step of its own. Where two stand side by side, what the
first one gave goes on behind the residual stream, as its second half, until both are added.

The decoder yields `StateReady` with q, k and v before the convolution, and the gates of the recurrence; the state and
the convolution are the holder's. The gate of a mixer's output (`OutputGate` in `state_layers.py`, also that of
Qwen3-Next's attention) is computed behind the mixer from the stream that entered it, so nothing but that stream lives
across. `families.States` says which rows of which tensors are q, k, v and gates; ranks have heads of states with the
heads of q and k that belong to them. A norm over all heads takes one more sum over ranks. Multipliers (Falcon-H1) go
into the scale of q.k, the convolution's weights and what is added to the residual stream, all of which are float32.

Latents
-------

Attention over latents (MLA: DeepSeek, MiniCPM 3) is absorbed: `workers/lamina_workers/decoder/choices.py` takes each
head's map from a latent to k into q, and that to v behind the attention. What is left is one KV head, of which all
query heads are one group. Its k is the latent with its rotated part, 512 + 64 numbers in DeepSeek V3, and V is the
front of K: nothing is sent or stored for it (`LayerSpec.own_v`, `PageLayout.latent`). So a token takes 576 numbers a
layer, of int8 one scale more, and a page nothing else.

- On a CPU a block of K is turned into the order of V once (`strips.py`) for all query vectors of a piece, and the
  loops are those of any attention. Arithmetic binds, not memory (docs/internals/performance.md). Triton's kernels
  load a latent once and transpose it.
- There is one KV head, so attention workers divide positions, not heads. Each of several ranks has some query heads,
  and holders of its own that keep the latent whole: a rank attends alone, as with other models, and a latent is small
  beside what it replaces. Ranks must divide the heads.
- Static policies work. Those that choose pages are refused: sketches are not made of latents.
- A prompt's own tokens are attended in the same form. k and v of each head would take 0.3 to 0.4 of the attention's
  time from 512 tokens on, which is 6 to 12 % of a prompt of DeepSeek V3; it would take a second form of the present,
  whose answers are of another width than the past's.
"""
