"""The verbs from folder to folder, in the order of the notebooks."""

from .chain import last_finished as last_finished
from .chain import open_embeddings as open_embeddings
from .checks import preflight as preflight
from .embedding import embed as embed
from .embedding import finish_embed as finish_embed
from .embedding import start_embed as start_embed
from .groups import options as options
from .index import audit_index as audit_index
from .index import build_index as build_index
from .index import check_index as check_index
from .index import index_metrics as index_metrics
from .index import index_stages as index_stages
from .index import judge_index as judge_index
from .index import search as search
from .index import start_index as start_index
from .index import tune_index as tune_index
from .match import browse as browse
from .match import match_metrics as match_metrics
from .match import match_pairs as match_pairs
from .match import open_match as open_match
from .match import start_match as start_match
from .references import make_references as make_references
from .references import start_reference_tokens as start_reference_tokens
from .references import start_references as start_references
from .report import start_report as start_report
from .sending import send as send
