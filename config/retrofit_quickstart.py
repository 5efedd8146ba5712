# Adds retrieval to the quickstart's GPT, whose weights stay as they are (docs/start.md):
# python train.py config/quickstart.py config/retrofit_quickstart.py
out_dir = 'out/retrofit_quickstart'
init_from = 'out/quickstart_gpt'
retrofit = True
eval_interval = 150
max_iters = 300
warmup_iters = 30
