# Adds retrieval from your documents to GPT-2, whose weights stay as they are (docs/start.md), after a config of yours:
# python train.py config/my_run.py config/retrofit_gpt2.py
out_dir = 'out/retrofit_gpt2'
init_from = 'gpt2'  # or gpt2-medium, gpt2-large, gpt2-xl, or a folder that transformers saved
retrofit = True  # False trains GPT-2's weights, too, which wants a smaller learning rate, such as 6e-5

batch_size = 8
gradient_accumulation_steps = 4  # 32,768 tokens a step
learning_rate = 1e-3
max_iters = 1000
warmup_iters = 100
eval_interval = 250
eval_tokens = 200_000
