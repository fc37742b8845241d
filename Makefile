# make help       print these lines
# make demo       install, make a data set, train, measure, and draw what is retrieved
# make serve      the search page on the demo's data base
# make test       the tests one waits for; make test-slow: the others; make lint
# make results    the runs of docs/results.md and docs/ablation.md, on the data sets in DATA, JOBS at a time
# make sweep      R@1 over the momentum of moving proxies, 21 small runs
# make gpu        results/gpu.md: what only a GPU can show; exits with 2 on a machine without one
# make lowest     the tests with the lowest versions that requirements.txt and requirements-serve.txt allow
# What is finished is kept, and interrupted runs continue.
PYTHON ?= python3
BIN := .venv/bin
DEMO_RUN := glyph_timm-resnet10t_balanced_proxy_128
DEMO_FIGURE := results/test_U+0052_0000_and_3_more/top8.png
DEMO_QUERIES := test_U+0052_0000.png test_U+00F8_0000.png test_U+03A9_0000.png test_U+0416_0000.png

DATA ?= /home/data
WEIGHTS ?= imagenet
JOBS ?= 1

.PHONY: help demo serve sweep results gpu test test-slow lowest lint clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: .venv/demo
	$(BIN)/python data_utils.py --data_path data --data_name glyph
	$(BIN)/python train.py --data_path data --data_name glyph --recipe balanced_proxy \
		--backbone_type timm:resnet10t --weights none --freeze_bn 0 --pooling avg --layer_norm 0 --feature_dim 128 \
		--image_size 48 --resize_size 48 --min_crop 0.8 --flip 0 --batch_size 25 --num_epochs 7 --eval_every 7 --warm_up 0 \
		--lr 2e-3 --proxy_lr 1e-2 --lr_schedule cosine --pretrained_baseline 1 --overwrite
	$(BIN)/python evaluate.py --data_base results/$(DEMO_RUN)_data_base.pth
	$(BIN)/python test.py --data_path data --data_base $(DEMO_RUN)_data_base.pth --query_img_name $(DEMO_QUERIES)
	@$(BIN)/python benchmarks/summarize_demo.py $(DEMO_RUN) $(DEMO_FIGURE)

serve: .venv/serve
	$(BIN)/python serve.py --data_path data --data_base $(DEMO_RUN)_data_base.pth

sweep: .venv/demo
	$(BIN)/python benchmarks/reproduce.py sweep --jobs $(JOBS)
	$(BIN)/python plot.py --sweep results/sweep --over momentum --line loss_name

results: .venv/demo
	$(BIN)/python benchmarks/reproduce.py --data_path $(DATA) --weights $(WEIGHTS) --jobs $(JOBS)

gpu: .venv/demo
	$(BIN)/python benchmarks/bench_gpu.py

test: .venv/test
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

lowest:
	$(PYTHON) -m venv .venv-lowest
	cat requirements.txt requirements-serve.txt | sed '/^-r/d; s/>=/==/' | .venv-lowest/bin/pip install -r /dev/stdin -r requirements-export.txt pytest pytest-xdist hypothesis pytorch-metric-learning tensorboard pyarrow
	.venv-lowest/bin/python -m pytest

lint: .venv/test
	$(BIN)/ruff check

clean:
	rm -rf .venv .venv-lowest .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is too old: Python 3.10 or newer is needed; try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo: requirements.txt | .venv/python
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/serve: requirements.txt requirements-serve.txt | .venv/python
	$(BIN)/pip install -r requirements-serve.txt
	touch $@

.venv/test: requirements.txt requirements-serve.txt requirements-export.txt requirements-dev.txt | .venv/python
	$(BIN)/pip install -r requirements-dev.txt
	touch $@
