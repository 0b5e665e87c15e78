"""A small trained Qwen2.5-VL that judges sparse attention: synthetic long-video tasks, training, evaluation.

words.py      every word, and the tokenizer made of them
sprites.py    bitmaps: glyphs, shapes, borders, ball
scenes.py     what a clip shows, as numbers, and its drawing
plans.py      text, clips and turns of one sample before anything is drawn
visual.py     the tasks on one video
mixed.py      the task on text, images and videos
tasks.py      make_sample
inputs.py     Encoder: token ids, labels, positions, pixels
forward.py    the model's forward pass without Python loops over frames
model.py      architecture, files of a model folder, export
batches.py    batches for training, planned in worker processes
config.py     sizes and stages
train.py      the loop: look.py for the vision tower, answers.py for all the rest; checkpoint.py, plot.py
evaluate.py   accuracy by task, length and depth
"""
