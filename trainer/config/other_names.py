"""What TRL's trainers and peft call our settings: for the hints of a key that is none.

Names are those of TRL's `DistillationConfig`, `GKDConfig` and `SFTConfig`, of transformers' `TrainingArguments` and of
its scripts. A key with the same last part as one of ours needs no entry.
"""

from __future__ import annotations

COHORT = {
    "output_dir": "output",
    "out": "output",
    "run_name": "run",
    "teacher_model": "a teacher is served (tutelage teacher serve); name its address in teacher.address",
    "teacher_model_name_or_path": "a teacher is served (tutelage teacher serve); name its address in teacher.address",
}

STUDENT = {
    "model": "init",
    "model_name_or_path": "init",
    "student_model": "init",
    "dataset_name": "data.path",
    "train_file": "data.path",
    "train_dataset": "data.path",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "num_steps": "steps",
    "lr": "optimizer.learning_rate",
    "lmbda": "objective.on_policy_fraction",
    "seq_kd": "it is an objective of its own, objective.name: seq_kd",
    "loss_type": "objective.name",
    "loss_top_k": "objective.k",
    "top_k": "objective.k",
    "per_device_train_batch_size": "a step has batch.sequences, batch.micro_batch_sequences of them at once",
    "gradient_accumulation_steps": "it follows from batch.sequences and batch.micro_batch_sequences",
    "batch_size": "batch.sequences",
    "max_length": "batch.max_tokens",
    "max_seq_length": "batch.max_tokens",
    "max_completion_length": "sampling.max_new_tokens",
    "use_vllm": "it is sampling.engine, transformers or vllm",
    "warmup_ratio": "it is optimizer.warmup_steps, in steps",
    "optim": "it is AdamW, with the settings of optimizer",
    "completion_only_loss": "it is loss_on_prompt, false unless set",
    "assistant_only_loss": "it is loss_on_prompt, false unless set",
    "lora_r": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "use_peft": "it is lora, with r, lora_alpha, lora_dropout and target_modules",
    "peft_config": "it is lora, with r, lora_alpha, lora_dropout and target_modules",
    "bf16": "it is dtype, bfloat16 or float32",
    "fp16": "it is dtype, bfloat16 or float32",
    "torch_dtype": "dtype",
    "save_steps": "save_every_steps",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "held_out.every_steps",
    "metric_for_best_model": "best.metric",
    "load_best_model_at_end": "it is best, which keeps that checkpoint",
    "early_stopping_patience": "best.patience",
    "num_gpus": "gpus",
    "num_cpus": "threads",
    "fsdp": "sharding",
}
