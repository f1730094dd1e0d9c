"""What train.py and eval.py share: experiments from configs, checkpoints, evaluation, reports."""
