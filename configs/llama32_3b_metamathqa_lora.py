"""LoRA on Llama-3.2-3B: MetaMathQA, scored on GSM8K, as Hugging Face PEFT's comparison does it.

Command: python train.py --config=configs/llama32_3b_metamathqa_lora.py --config.task.root=FOLDER
         python eval.py --run=runs/llama32_3b_metamathqa_lora --grade --new_tokens=300
FOLDER holds metamathqa/MetaMathQA-395K.json and gsm8k/{train,test}.jsonl.
Time: not run here, where no GPU holds the model; 942 s on one L40S in that comparison.
Result: not measured; that comparison ends at 47.8 % of GSM8K's test questions.
":tiny" runs the same steps on GSM8K alone, with random weights.
"""

from ml_collections import ConfigDict

from configs.base import Config, decoder_language


def get_config(mode: str = "") -> Config:
    """`mode`: "" or "tiny"."""
    config = decoder_language("llama32_3b_metamathqa_lora", mode)
    config.model.source = "meta-llama/Llama-3.2-3B"
    config.task = ConfigDict(
        {
            "name": "metamathqa",
            "root": "../shared/data",
            "template": "step_by_step",
            "learn_prompt": True,
        },
        type_safe=False,
    )
    config.method = ConfigDict(
        {"method": "lora", "rank": 32, "alpha": 64.0, "targets": r"(q_proj|v_proj)/kernel"}
    )
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay, config.optimizer.warmup = 0.1, 0.1
    if mode == "tiny":
        config.model.source = "tiny-llama"
        config.task.name, config.task.examples, config.method.rank = "gsm8k", 40, 8
        return config
    config.model.dtype = config.model.param_dtype = "bfloat16"
    config.model.remat = "dots"
    config.data.max_length = 768
    config.data.batch_size, config.data.eval_batch_size = 4, 50
    config.train.steps, config.train.eval_every, config.train.save_every = 5000, 250, 250
    return config
