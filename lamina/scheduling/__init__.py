"""Pure decisions: what is computed in the next batch, and which holder keeps what.

How decode runs
---------------

`StepTuner` (`lamina/scheduling/step_tuner.py`, pure) chooses three things together, since they depend on each other:
how many lanes, the local share, and the order of q, k and v. What was given as a number, or as "always" or "never",
stays. The module says how it searches, when, and what a search may cost; of choices that are equal within 1 % the
simplest holds: all local, fewer lanes, q, k and v together. Steps with prompts or moves are not measured. In one
process nothing is tried. A line of the logger `lamina.choices` says where KV is read and what a step takes on either
side: `lamina generate` prints it below the answer, the engine of `lamina serve` once for each new place.

Speculation
-----------

Before a plan, `Proposer.propose` (`lamina/engine/drafting.py`) gives drafts to the sequences that decode: by n-grams
(`drafting.py`, each token indexed once) or by a small model with KV of its own in this process (`draft_model.py`). How
many is `Speculation` (`lamina/scheduling/speculation.py`, pure): the chance of each position by what was accepted, the
seconds of a step by what was measured for so many rows and tokens, and the number with the most tokens a second. An
account of what drafts have gained or lost keeps them from costing more than a small share of the time where they do not
pay.

A decode row then has 1 + k tokens. It goes through the seam like any row: all positions are stored, each attends those
before it, KV is read once. All its positions are sampled, each as if the drafts before it were the text: penalties,
masks of structured output, `min_tokens` and logprobs see them. `verified` (`lamina/scheduling/scheduler.py`) keeps the
drafts that equal what was sampled, and the first token that differs. Of the others nothing is kept: the sequence is
shorter than what holders have stored, and its next row cuts each part back and writes over them. A state cannot be cut
back: its holder keeps the inputs of such a row, and the next row's start says which of them are taken in
(`workers/lamina_workers/kv_pages/state_store.py`). Prefixes, journal,
moves and rebuilding count tokens of the sequence, never drafts.

Why the text is the same. Verification draws each position's token with the random number of (seed, sample, position),
as without drafts; a draft decides only how many tokens come in one step. A draft model draws with the same random
numbers from its own distribution, which couples the two: they differ where the number falls between their cumulative
probabilities. Rejection sampling (arXiv 2211.17192) gives the same distribution but other texts.
"""
