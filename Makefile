# make demo: install, make a data set, train, measure, draw. make serve: a page that searches in it. make test: all
# tests, in the same environment.
# make sweep: R@1 over the momentum of moving proxies, 21 small runs. make -j2 results: all runs of docs/results.md, on
# CARS196 and CUB200 in DATA with the trunk in WEIGHTS; what is finished is kept, what was cut off goes on.
# make gpu: what no test without a GPU can see, as a table, results/gpu.md; ends with 2 where there is none.
PYTHON ?= python3
BIN := .venv/bin
DEMO_RUN := glyph_resnet18_balanced_proxy_128
DEMO_QUERIES := test_U+0052_0000.png test_U+00F8_0000.png test_U+03A9_0000.png test_U+0416_0000.png

SWEEP_MOMENTA := 0.05 0.1 0.3 0.5 0.7 0.9 0.95
SWEEP_SEEDS := 1 2 3

DATA ?= /home/data
WEIGHTS ?= imagenet
GRID_SEEDS ?= 1 2 3
GRID_LOSSES := normalized_softmax balanced_proxy proxy_anchor proxy_nca cos_face arc_face
GRID_RULES := positive momentum gradient
GRID_RECIPES := balanced_proxy asymptotic_proxy positive_proxy momentum_proxy proxy_anchor
GRID_PROTOCOL := --data_path $(DATA) --data_name car --backbone_type timm:tf_efficientnet_lite0 --weights $(WEIGHTS) \
	--image_size 128 --cache_size 146 --recalls 1,2,4,8 --num_workers 0 --on_collapse warn
GRID_SCHEDULE := --batch_size 120 --warm_up 1 --lr 1e-4 --lr_schedule step --lr_decay_step 3 \
	--lr_decay_gamma 0.5
# A run is FOLDER/NAME.SEED.
RECIPE_RUNS = $(foreach seed,$(GRID_SEEDS),$(foreach recipe,$(GRID_RECIPES),recipes/$(recipe).$(seed)))
# With the warm-up, rates and schedule of the recipe.
OWN_RUNS = $(foreach seed,$(GRID_SEEDS) 4 5,$(foreach recipe,whitened_mirror whitened_margin whitened_start,\
	own/$(recipe).$(seed))) \
	$(foreach seed,$(GRID_SEEDS),$(foreach recipe,$(GRID_RECIPES),own/$(recipe).$(seed)))
BATCH_whitened_margin := 32
RULE_RUNS = $(foreach seed,$(GRID_SEEDS),$(foreach loss,$(GRID_LOSSES),$(foreach rule,$(GRID_RULES),\
	rules/$(loss)-$(rule).$(seed))) rules/balanced_proxy_split-gradient.$(seed))
# At other scales and rates of the proxies.
ARC_RUNS := arc_face/32-0.01.1 arc_face/16-0.01.1 arc_face/64-0.0001.1
LONG_RUNS = $(foreach seed,$(GRID_SEEDS),$(foreach recipe,whitened_margin proxy_anchor whitened_start positive_proxy,\
	long/$(recipe).$(seed))) $(foreach seed,$(GRID_SEEDS) 4 5,long/whitened_mirror.$(seed)) \
	long/balanced_proxy.1
# Measured on held out training classes: parts of whitened_start, then of whitened_margin.
ABLATION_positive_proxy = --recipe positive_proxy --batch_size 64
ABLATION_whitened_start = --recipe whitened_start
ABLATION_without-whitening = $(ABLATION_whitened_start) --linear_init random
ABLATION_without-means = $(ABLATION_whitened_start) --proxy_init unit
ABLATION_without-both = $(ABLATION_without-whitening) --proxy_init unit
ABLATION_without-rate-and-schedule = $(ABLATION_whitened_start) --lr 1e-4 --proxy_lr 1e-2 --lr_schedule step \
	--lr_decay_step 3
ABLATION_without-small-batches = $(ABLATION_whitened_start) --batch_size 120
ABLATION_with-gem = $(ABLATION_whitened_start) --pooling gem
ABLATION_whitened_margin = --recipe whitened_margin
ABLATION_without-margin = $(ABLATION_whitened_margin) --loss_name positive_proxy
ABLATION_without-large-crops = $(ABLATION_whitened_margin) --min_crop 0.08
ABLATION_without-batches-of-32 = $(ABLATION_whitened_margin) --batch_size 64
ABLATION_with-colors = $(ABLATION_whitened_margin) --color_jitter 0.3 --grayscale 0.2
# CUB200: no setting was chosen on it.
CHECK_RUNS = $(foreach seed,$(GRID_SEEDS),$(foreach recipe,whitened_mirror whitened_margin whitened_start \
	positive_proxy,check/$(recipe).$(seed)))
ABLATION_RUNS = $(foreach seed,$(GRID_SEEDS),$(foreach row,positive_proxy whitened_start without-whitening \
	without-means without-both without-rate-and-schedule without-small-batches with-gem,\
	ablation/$(row).$(seed)) $(foreach row,whitened_margin without-margin without-large-crops \
	without-batches-of-32 with-colors,margin/$(row).$(seed)))
# Memory that a step frees is kept for the next one in place of being returned and asked for again.
SPARE_MALLOC := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456

.PHONY: demo serve sweep results cache-car cache-cub gpu test lowest lint clean

demo: .venv/demo
	$(BIN)/python data_utils.py --data_path data --data_name glyph
	$(BIN)/python train.py --data_path data --data_name glyph --recipe balanced_proxy \
		--backbone_type resnet18 --weights none --max_pool 0 --freeze_bn 0 --pooling avg --layer_norm 0 \
		--feature_dim 128 --image_size 48 --resize_size 48 --min_crop 0.8 --flip 0 \
		--batch_size 50 --num_epochs 7 --warm_up 0 --lr 1e-3 --proxy_lr 1e-2 --lr_schedule cosine --overwrite
	$(BIN)/python evaluate.py --data_base results/$(DEMO_RUN)_data_base.pth
	$(BIN)/python test.py --data_path data --data_base $(DEMO_RUN)_data_base.pth --query_img_name $(DEMO_QUERIES)

serve: .venv/serve
	$(BIN)/python serve.py --data_path data --data_base $(DEMO_RUN)_data_base.pth

# Runs that are there already are kept, so that a sweep that was cut short goes on.
sweep: .venv/demo
	$(BIN)/python data_utils.py --data_path data/sweep --data_name glyph --glyph_classes 150
	set -e; for momentum in $(SWEEP_MOMENTA); do for seed in $(SWEEP_SEEDS); do \
		test -f results/sweep/glyph_timm-resnet10t_asymptotic_proxy_64_m$${momentum}_seed$${seed}_curves.png || \
		$(BIN)/python train.py --data_path data/sweep --data_name glyph --recipe asymptotic_proxy \
			--backbone_type timm:resnet10t --weights none --freeze_bn 0 --feature_dim 64 \
			--image_size 32 --resize_size 32 --min_crop 0.8 --flip 0 --batch_size 25 --num_epochs 5 --lr 1e-3 \
			--lr_schedule cosine --recalls 1,2,4 --num_workers 0 \
			--momentum $$momentum --seed $$seed --on_collapse warn --results_dir results/sweep --overwrite; \
	done; done
	$(BIN)/python plot.py --sweep results/sweep --over momentum --line loss_name

results: $(RECIPE_RUNS) $(OWN_RUNS) $(ABLATION_RUNS) $(CHECK_RUNS) $(RULE_RUNS) $(ARC_RUNS) $(LONG_RUNS)

cache-car cache-cub: cache-%: .venv/demo
	$(BIN)/python data_utils.py --data_path $(DATA) --data_name $* --cache_size 146

# $(call grid_run,EPOCHS,FLAGS): one with a row of statistics for each epoch is finished; one that was cut off has a
# checkpoint.
NAME_OF_RUN = $(basename $*)
SEED_OF_RUN = $(or $(filter-out 0,$(patsubst .%,%,$(suffix $*))),$(error $@: names of runs say no seed 0; begin with 1))
OWN_BATCH = $(or $(BATCH_$(NAME_OF_RUN)),64)
WORD_OF_RUN = $(word $(1),$(subst -, ,$(NAME_OF_RUN)))
FILES_OF_RUN = results/grid/$(@D)/*_seed$(SEED_OF_RUN)_$(NAME_OF_RUN)
grid_run = @awk 'FNR > $(1) {whole = 1} END {exit !whole}' $(FILES_OF_RUN)_statistics.csv 2> /dev/null || \
	$(SPARE_MALLOC) $(BIN)/python train.py $(GRID_PROTOCOL) $(2) --num_epochs $(1) --seed $(SEED_OF_RUN) \
		--remark $(NAME_OF_RUN) --results_dir results/grid/$(@D) \
		$$(ls $(FILES_OF_RUN)_checkpoint.pth > /dev/null 2>&1 && echo --resume || echo --overwrite)

recipes/%: cache-car
	$(call grid_run,6,--recipe $(NAME_OF_RUN) $(GRID_SCHEDULE))

own/%: cache-car
	$(call grid_run,6,--recipe $(NAME_OF_RUN) --batch_size $(OWN_BATCH))

held_out_run = $(call grid_run,6,$(or $(ABLATION_$(NAME_OF_RUN)),$(error no row $(NAME_OF_RUN))) --val_ratio 0.4 \
	--epoch0 0)

ablation/%: cache-car
	$(held_out_run)

margin/%: cache-car
	$(held_out_run)

check/%: cache-cub
	$(call grid_run,6,--data_name cub --recipe $(NAME_OF_RUN) --batch_size $(OWN_BATCH))

rules/%: cache-car
	$(call grid_run,6,--recipe positive_proxy $(GRID_SCHEDULE) --loss_name $(call WORD_OF_RUN,1) \
		--proxy_update $(call WORD_OF_RUN,2))

arc_face/%: cache-car
	$(call grid_run,6,--recipe positive_proxy $(GRID_SCHEDULE) --loss_name arc_face --proxy_update gradient \
		--scale $(call WORD_OF_RUN,1) --proxy_lr $(call WORD_OF_RUN,2))

long/%: cache-car
	$(call grid_run,20,--recipe $(NAME_OF_RUN) --batch_size $(OWN_BATCH))

gpu: .venv/demo
	$(BIN)/python benchmarks/bench_gpu.py

test: .venv/test
	$(BIN)/python -m pytest

lowest:
	$(PYTHON) -m venv .venv-lowest
	sed 's/>=/==/' requirements.txt | .venv-lowest/bin/pip install -r /dev/stdin -r requirements-export.txt pytest pytest-xdist hypothesis pytorch-metric-learning tensorboard
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
