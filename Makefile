# make quickstart   from an empty machine to a trained RETRO and a sample of it
# make serve        the page and the API of the quickstart's RETRO, at http://127.0.0.1:8000
# make test         the tests
# make test-slow    the tests that take long: many kills, Inductor, load, a Milvus server
# make lint         ruff
# make clean        remove all that these made: .venv, the quickstart's corpus, database and run

PYTHON ?= python3
PY = .venv/bin/python
CORPUS = data/python_source
RUN = out/quickstart
GPT = out/quickstart_gpt

.DELETE_ON_ERROR:
.PHONY: quickstart serve test test-slow lint clean

# Set-up: one stamp per requirements file, so a second call does nothing and a changed file is installed.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
	    $(PYTHON) --version; echo "error: nanoRETRO needs Python 3.10 to 3.12; name one: make PYTHON=python3.12 ..."; exit 2; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@echo 'installing the packages of requirements.txt into .venv (a minute or two, 2 GB)'
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-serve: requirements-serve.txt .venv/installed
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-serve.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-documents.txt .venv/installed-serve
	@$(PY) -m pip install -qq --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The quickstart's steps, each done once. An interrupted training resumes from its checkpoint.
$(CORPUS)/train.parquet: | .venv/installed
	$(PY) $(CORPUS)/prepare.py

out/static_embedding/modules.json: $(CORPUS)/train.parquet
	$(PY) -m retrieval.static_embedding config/quickstart.py

out/populated: out/static_embedding/modules.json
	$(PY) -m retrieval.populate config/quickstart.py
	@touch $@

$(RUN)/trained: config/quickstart.py out/populated
	$(PY) train.py config/quickstart.py \
	    $$(test -e $(RUN)/trained -o ! -e $(RUN)/checkpoints/latest || echo --init_from=resume)
	@touch $@

# The same decoder without retrieval, to compare with.
$(GPT)/trained: config/quickstart.py out/populated
	$(PY) train.py config/quickstart.py --use_retrieval=False --out_dir=$(GPT) --eval_interval=600 \
	    $$(test -e $(GPT)/trained -o ! -e $(GPT)/checkpoints/latest || echo --init_from=resume)
	@touch $@

quickstart: $(RUN)/trained $(GPT)/trained
	@$(PY) sample.py --out_dir=$(RUN) --start=FILE:config/quickstart_prompt.txt --max_new_tokens=96 --show_neighbors
	@$(PY) -m evaluation --out_dir=$(RUN) --baseline=$(GPT) --max_tokens=80000

serve: $(RUN)/trained .venv/installed-serve
	$(PY) serve.py --out_dir=$(RUN)

test: .venv/installed-dev
	$(PY) -m pytest tests

test-slow: .venv/installed-dev
	$(PY) -m pytest tests -m slow -n 1 -v

lint: .venv/installed-dev
	$(PY) -m ruff check .

clean:
	rm -rf .venv $(RUN) $(GPT) out/static_embedding out/milvus.db out/populated out/neighbors out/matches out/datasets \
	    $(CORPUS)/train.parquet $(CORPUS)/val.parquet $(CORPUS)/tokenizer.json $(CORPUS)/corpus.json .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
