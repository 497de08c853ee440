"""MT-Bench (Zheng et al., arXiv 2306.05685): 80 questions of two turns, graded by another model."""
from evaluation.task import Score, Task


class MTBench(Task):
    """Each category a domain. Nothing is graded here: a judge model reads the answers."""
    name, graded, max_new_tokens = "mt_bench", False, 1024  # as FastChat's gen_model_answer
    fields = ("question_id", int), ("category", str), ("turns", list)

    def problem(self, example):
        if not all(isinstance(turn, str) and turn for turn in example["turns"]):
            return f"the turns of question {example['question_id']} are not all texts"

    def id(self, i, line):
        return str(line["question_id"])

    def domain(self, line):
        return line["category"]

    def prompt(self, example) -> str:
        return example["turns"][0]

    def chat(self, example) -> str:
        return example["turns"][0]

    def follow_up(self, example, answers):
        return next(iter(example["turns"][len(answers):]), None)

    def score(self, example, completion: str) -> Score:
        return Score(None, "not graded")
