"""One function per client, which imports the client, calls it and returns values that JSON can hold."""

from __future__ import annotations

from typing import Any

Vectors = list[list[float]]
Ranks = list[list[Any]]
"""``[index, score, document]`` of each result, in the order in which the client gives them."""


# ---------------------------------------------------------------------------------------------------------- LiteLLM


def litellm_embed(model: str, api_base: str, texts: list[str], **fields: object) -> Vectors:
    import litellm

    answer = litellm.embedding(model=model, api_base=api_base, api_key="any", input=texts, **fields)
    return [item["embedding"] for item in answer.data]


def litellm_rerank(model: str, api_base: str, query: str, documents: list[str], top_n: int) -> Ranks:
    import litellm

    answer = litellm.rerank(
        model=model,
        api_base=api_base,
        api_key="any",
        query=query,
        documents=documents,
        top_n=top_n,
        return_documents=True,
    )
    results = answer.results or []
    return [[one["index"], one["relevance_score"], (one.get("document") or {}).get("text")] for one in results]


def litellm_batch(api_base: str, content: str, endpoint: str) -> dict[str, Any]:
    """Upload a file, make a batch of it, wait for its end, and return it with its output and its errors."""
    import time

    import litellm

    where: dict[str, Any] = {"custom_llm_provider": "openai", "api_base": api_base, "api_key": "any"}
    file = litellm.create_file(file=("requests.jsonl", content.encode()), purpose="batch", **where)
    batch = litellm.create_batch(completion_window="24h", endpoint=endpoint, input_file_id=file.id, **where)
    deadline = time.monotonic() + 30
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = litellm.retrieve_batch(batch_id=batch.id, **where)
    listed = litellm.list_batches(**where)
    output = litellm.file_content(file_id=batch.output_file_id, **where).text if batch.output_file_id else ""
    litellm.file_delete(file_id=file.id, **where)
    return {"status": batch.status, "output": output, "listed": [one.id for one in listed.data], "id": batch.id}


# ----------------------------------------------------------------------------------------------------------- Cohere


def cohere_rerank(version: int, url: str, model: str, query: str, documents: list[str], top_n: int) -> Ranks:
    import cohere

    with (cohere.Client if version == 1 else cohere.ClientV2)(api_key="any", base_url=url) as client:
        answer = client.rerank(model=model, query=query, documents=documents, top_n=top_n)
    return [[one.index, one.relevance_score, None] for one in answer.results]


def cohere_rerank_v1(url: str, model: str, query: str, documents: list[Any]) -> Ranks:
    import cohere

    with cohere.Client(api_key="any", base_url=url) as client:
        answer = client.rerank(
            model=model,
            query=query,
            documents=documents,
            rank_fields=["text"],
            return_documents=True,
            max_chunks_per_doc=3,
        )
    return [[one.index, one.relevance_score, one.document.text] for one in answer.results]


# ----------------------------------------------------------------------------------------------------------- Chroma


def chroma_server(url: str, texts: list[str]) -> Vectors:
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    return [vector.tolist() for vector in HuggingFaceEmbeddingServer(url=url)(texts)]


def chroma_openai(url: str, model: str, texts: list[str]) -> Vectors:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    function = OpenAIEmbeddingFunction(api_key="any", api_base=url, model_name=model)
    return [vector.tolist() for vector in function(texts)]


def chroma_ollama(url: str, model: str, texts: list[str]) -> Vectors:
    from chromadb.utils.embedding_functions import OllamaEmbeddingFunction

    return [vector.tolist() for vector in OllamaEmbeddingFunction(url=url, model_name=model)(texts)]


def chroma_jina(url: str, model: str, texts: list[str], query: str, **fields: object) -> list[Vectors]:
    from chromadb.utils.embedding_functions import JinaEmbeddingFunction

    function = JinaEmbeddingFunction(api_key="any", model_name=model, **fields)
    function._api_url = url  # the only way to set it
    return [[vector.tolist() for vector in vectors] for vectors in (function(texts), function.embed_query([query]))]


def chroma_collection(url: str, texts: list[str], query: str) -> list[str]:
    """Return the documents of a collection, the nearest to a query first."""
    import chromadb
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    client = chromadb.EphemeralClient()
    collection = client.create_collection("documents", embedding_function=HuggingFaceEmbeddingServer(url=url))
    collection.add(ids=[str(i) for i in range(len(texts))], documents=texts)
    return collection.query(query_texts=[query], n_results=len(texts))["documents"][0]


# ---------------------------------------------------------------------------------------------------------- pymilvus


def pymilvus_tei(url: str, texts: list[str], query: str) -> dict[str, Any]:
    from pymilvus import model

    function = model.dense.TEIEmbeddingFunction(api_url=url)
    return {
        "dim": function.dim,
        "documents": [vector.tolist() for vector in function.encode_documents(texts)],
        "queries": [vector.tolist() for vector in function.encode_queries([query])],
    }


def pymilvus_openai(url: str, model: str, texts: list[str]) -> Vectors:
    from pymilvus.model.dense import OpenAIEmbeddingFunction

    function = OpenAIEmbeddingFunction(model_name=model, base_url=url, api_key="any")
    return [vector.tolist() for vector in function.encode_documents(texts)]


def pymilvus_jina(url: str, model: str, texts: list[str], query: str) -> dict[str, Any]:
    from pymilvus.model.dense import jinaai

    jinaai.API_URL = url  # the only way to set it
    function = jinaai.JinaEmbeddingFunction(model_name=model, api_key="any")
    return {
        "dim": function.dim,
        "documents": [vector.tolist() for vector in function.encode_documents(texts)],
        "queries": [vector.tolist() for vector in function.encode_queries([query])],
    }


def pymilvus_tei_rerank(url: str, query: str, documents: list[str]) -> Ranks:
    from pymilvus.model.reranker import TEIRerankFunction

    return [[one.index, one.score, one.text] for one in TEIRerankFunction(api_url=url)(query, documents)]


def pymilvus_jina_rerank(url: str, model: str, query: str, documents: list[str], top_n: int) -> Ranks:
    from pymilvus.model.reranker import jinaai

    jinaai.API_URL = url
    results = jinaai.JinaRerankFunction(model_name=model, api_key="any")(query, documents, top_k=top_n)
    return [[one.index, one.score, one.text] for one in results]


# --------------------------------------------------------------------------------------------------------- LlamaIndex


def llamaindex_tei(url: str, texts: list[str], query: str) -> list[Vectors]:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    embedding = TextEmbeddingsInference(base_url=url, model_name="any", embed_batch_size=2)
    return [embedding.get_text_embedding_batch(texts), [embedding.get_query_embedding(query)]]


def llamaindex_jina(url: str, model: str, texts: list[str], **fields: object) -> Vectors:
    from llama_index.embeddings.jinaai import JinaEmbedding

    embedding = JinaEmbedding(model=model, api_key="any", **fields)
    embedding._api.api_url = url  # the only way to set it
    return embedding.get_text_embedding_batch(texts)


def llamaindex_rerank(kind: str, url: str, query: str, documents: list[str], top_n: int, **fields: object) -> Ranks:
    from llama_index.core.schema import NodeWithScore, TextNode

    if kind == "tei":
        from llama_index.postprocessor.tei_rerank import TextEmbeddingInference as Reranker
    else:
        from llama_index.postprocessor.jinaai_rerank import JinaRerank as Reranker

        fields["api_key"] = "any"
    reranker = Reranker(base_url=url, top_n=top_n, **fields)
    nodes = [NodeWithScore(node=TextNode(text=text, id_=str(i)), score=0) for i, text in enumerate(documents)]
    results = reranker.postprocess_nodes(nodes, query_str=query)
    return [[int(one.node.node_id), one.score, one.node.get_content()] for one in results]


# ----------------------------------------------------------------------------------------------------------- Haystack


def haystack_jina(url: str, model: str, texts: list[str], query: str, tasks: list[str]) -> list[Vectors]:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.embedders.jina import JinaDocumentEmbedder, JinaTextEmbedder

    key = Secret.from_token("any")
    of_documents = JinaDocumentEmbedder(api_key=key, model=model, base_url=url, task=tasks[0], progress_bar=False)
    of_queries = JinaTextEmbedder(api_key=key, model=model, base_url=url, task=tasks[1])
    documents = of_documents.run([Document(content=text) for text in texts])["documents"]
    return [[document.embedding for document in documents], [of_queries.run(query)["embedding"]]]


def haystack_jina_rank(url: str, model: str, query: str, documents: list[str], top_n: int) -> Ranks:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(api_key=Secret.from_token("any"), model=model, base_url=url, top_k=top_n)
    given = [Document(content=text, meta={"index": i}) for i, text in enumerate(documents)]
    results = ranker.run(query, given)["documents"]
    return [[one.meta["index"], one.score, one.content] for one in results]


# ------------------------------------------------------------------------------------------------------------- Ollama


def ollama_embed(url: str, model: str, texts: list[str]) -> Vectors:
    import ollama

    return [list(vector) for vector in ollama.Client(host=url).embed(model=model, input=texts).embeddings]


def ollama_list(url: str) -> list[str]:
    import ollama

    return [one.model for one in ollama.Client(host=url).list().models]


# ----------------------------------------------------------------------------------------------------------- Infinity


def langchain_infinity(url: str, model: str, texts: list[str]) -> Vectors:
    from langchain_community.embeddings import InfinityEmbeddings

    return InfinityEmbeddings(infinity_api_url=url, model=model).embed_documents(texts)


def infinity_embed(url: str, texts: list[str], **fields: object) -> Vectors:
    from infinity_client import Client
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    with Client(base_url=url) as client:
        answer = embeddings.sync(client=client, body=OpenAIEmbeddingInputText.from_dict({"input": texts, **fields}))
    return [item.embedding for item in answer.data]


def infinity_rerank(url: str, model: str, query: str, documents: list[str], top_n: int) -> Ranks:
    from infinity_client import Client
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    body = {"query": query, "documents": documents, "model": model, "top_n": top_n, "return_documents": True}
    with Client(base_url=url) as client:
        answer = rerank.sync(client=client, body=RerankInput.from_dict(body))
    return [[one.index, one.relevance_score, one.document] for one in answer.results]


def infinity_models(url: str) -> list[str]:
    from infinity_client import Client
    from infinity_client.api.default import models

    with Client(base_url=url) as client:
        return [one.id for one in models.sync(client=client).data]
