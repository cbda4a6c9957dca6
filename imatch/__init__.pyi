"""The verbs in memory, what they take and what they give."""

from . import steps as steps
from .api.embed import embed as embed
from .api.embed import references as references
from .api.folder import FolderMatches as FolderMatches
from .api.folder import match_folder as match_folder
from .api.match import Match as Match
from .api.match import match as match
from .api.query import Answer as Answer
from .api.query import Answers as Answers
from .api.query import index as index
from .api.query import query as query
from .api.query import search as search
from .core.compute import ComputeOptions as ComputeOptions
from .data.embeddings import Embeddings as Embeddings
from .data.images import Resize as Resize
from .data.store import StorageOptions as StorageOptions
from .data.store import Stored as Stored
from .export.per_image import export_per_image as export_per_image
from .matching.align import GeometryOptions as GeometryOptions
from .matching.align import MatchingOptions as MatchingOptions
from .retrieval.index import IndexOptions as IndexOptions
from .retrieval.ranking import RankingOptions as RankingOptions
from .retrieval.truth import TruthOptions as TruthOptions
from .steps.sending import SendOptions as SendOptions

__version__: str
