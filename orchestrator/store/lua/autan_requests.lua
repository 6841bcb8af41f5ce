-- autan_requests: the live requests, page by page.
-- ARGV  limit (at most 1000), which ("all": oldest first; "at": those that instance `name` takes part in, by id;
--       "id": the request `name`), name, after_ms, after_id (the last request of the page before; 0 and "" for the first)
-- Reply OK, now_ms, k, k x (id, tenant, state, epoch, prompt_tokens, n, p, d, submitted_ms, attempts,
--       max_tokens, deadline_ms, next_epoch, moves, target of an open move or "", d_blocks)
-- Promise: reads only. What lives from the first page to the last is in exactly one of them.
local WHICH = {all = true, at = true, id = true}

-- A request that ended since leaves its place in the order, not its rank.
local function page_of_all(c, limit, after_ms, after_id)
  local live = k(c, 'live')
  if after_id == '' then return redis.call('ZRANGE', live, 0, limit - 1) end
  local rank = redis.call('ZRANK', live, after_id)
  if rank then return redis.call('ZRANGE', live, rank + 1, rank + limit) end
  local first = redis.call('ZCOUNT', live, '-inf', '(' .. after_ms)
  local ties = redis.call('ZCOUNT', live, after_ms, after_ms)
  for _, id in ipairs(ties > 0 and redis.call('ZRANGE', live, first, first + ties - 1) or {}) do
    if id > after_id then break end
    first = first + 1
  end
  return redis.call('ZRANGE', live, first, first + limit - 1)
end

local function page_of_instance(c, limit, instance, after_id)
  local incarnation = redis.call('HGET', k_instance(c, instance), 'incarnation')
  local all = incarnation and redis.call('SMEMBERS', k_parts(c, instance, incarnation)) or {}
  table.sort(all)
  local page = {}
  for _, id in ipairs(all) do
    if #page >= limit then break end
    if id > after_id then page[#page + 1] = id end
  end
  return page
end

local function autan_requests(keys, args)
  local c = open('autan_requests', keys, args)
  local limit = take_int(c, 'limit', 0, 1000)
  local which = take_one_of(c, 'which', WHICH)
  local name = take_bytes(c, 'name')
  local after_ms = text(take_int(c, 'after_ms', 0))
  local after_id = take_bytes(c, 'after_id')
  taken_all(c)
  local ids = {}
  if limit > 0 and which == 'all' then ids = page_of_all(c, limit, after_ms, after_id) end
  if limit > 0 and which == 'at' then ids = page_of_instance(c, limit, name, after_id) end
  if limit > 0 and which == 'id' and redis.call('ZSCORE', k(c, 'live'), name) then ids = {name} end
  local reply = {'OK', text(c.now), #ids}
  for _, id in ipairs(ids) do
    local r = load_request(c, id)
    for _, value in ipairs({
      id, r.tenant, r.state, r.epoch, r.prompt_tokens, journal_length(c, id), r.p, r.d, r.submitted_ms, r.attempts,
      r.max_tokens, r.deadline_ms, next_epoch(r), r.moves ~= '' and r.moves or '0', r.m_open == '1' and r.m or '',
      r.d_blocks ~= '' and r.d_blocks or '0',
    }) do
      reply[#reply + 1] = value
    end
  end
  return reply
end
redis.register_function{function_name = 'autan_requests', callback = autan_requests, flags = {'no-writes'}}
