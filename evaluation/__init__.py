"""Evaluation. DeepEval reads its environment at import; its telemetry and its reading of .env files are off."""
import os

os.environ.setdefault('DEEPEVAL_TELEMETRY_OPT_OUT', '1')
os.environ.setdefault('DEEPEVAL_DISABLE_DOTENV', '1')
