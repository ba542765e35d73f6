"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), asked of a run's model.

The harness runs in a process of its own, by whichever Python has it (`child`, `driver`), and the model stays in ours (`answers`):
the harness brings a task, its items, prompts and figures, and asks for tokens, likelihoods and continuations as lines of JSON.
So the weights and the tokenizer are the run's, every causal model can be asked, also one that no other library knows, and the
harness needs no PyTorch and has no say in what is installed beside elastic-lm.

Invariant: what is wrong with the Python, the names or the tasks is told before the model is loaded; the process ends with ours,
whatever ends ours.
"""
