"""Pure decisions: what is computed in the next batch, and which holder keeps what.

How decode runs
---------------

`StepTuner` (`lamina/scheduling/step_tuner.py`, pure) chooses three things together, since they depend on each other:
how many lanes, the local share, and the order of q, k and v. What was given as a number, or as "always" or "never",
stays.

- Model. `StepModel` (`step_tuner.py`) learns from each batch's KV tokens and seconds of both tiers: the speed of each
  tier, alone and beside the other, the fixed cost of a remote call, and what the rest of a step takes for each number
  of lanes and each order. It expects of a step the largest of what the model workers do, what the remote tier does,
  and what a batch waits for in its lane. What was not measured is assumed at its best, so that it is tried.
- Search. The choice with the shortest expected step is measured next (5 steps, their medians), while one promises 1 %
  more than the best so far, eight times at most. Then the best measured one holds, the simplest of those within 1 %:
  all local, fewer lanes, q, k and v together. Measured steps decide, since on shared cores tiers slow each other.
- Again. A search begins when the number of sequences or of their tokens has changed by half, when a tier's time for
  the same work has changed by more than 8 % of a step for some steps, when holders have changed, and after a pause
  without a cause, which keeps these below 1 % of the time. A search that ends where it began doubles the pause and
  the patience with drifts.
- What searches may cost. A search after a change of the load leaves for the attention workers only where the promise
  of 50 steps outweighs the debt: what searches have cost beyond 1 % of the time. Going back to the local tier is
  always tried. Where all was local and moves are short, leaving is confirmed by a second measurement there.
- In one line (logger `lamina.choices`): where KV is read and what a step takes on either side. `lamina generate`
  prints it below the answer, the engine of `lamina serve` once for each new place.
- Steps with prompts or moves are not measured. In one process nothing is tried.

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
shorter than what holders have stored, and its next row cuts each part back and writes over them. Prefixes, journal,
moves and rebuilding count tokens of the sequence, never drafts.

Why the text is the same. A token is a function of its logits and of a random number, which is a hash of (seed, sample,
position). Verification draws each position's token in that way, so it is the token that would have come without drafts;
a draft decides only how many come in one step. Rejection sampling (arXiv 2211.17192) gives the same distribution but
other texts. A draft that was fixed beforehand equals the drawn token with the probability p(draft), as often as
rejection sampling accepts it. A draft model draws with the same random numbers from its own distribution, which couples
the two: they differ where the number falls between their cumulative probabilities.
"""
