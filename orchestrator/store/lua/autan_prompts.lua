-- autan_prompts: the tokens of queued requests, for whoever names their KV blocks.
-- ARGV  k (at most 256), then k ids
-- Reply OK, then k x (spec, journal); two empty strings for an id that is not QUEUED, and for what is beyond 8 MiB of reply
-- Promise: reads only.
local function autan_prompts(keys, args)
  local c = open('autan_prompts', keys, args)
  local ids = {}
  for at = 1, take_int(c, 'k', 0, 256) do ids[at] = take_name(c, 'id') end
  taken_all(c)
  local reply, bytes = {'OK'}, 0
  for _, id in ipairs(ids) do
    local spec, journal = '', ''
    if bytes < PICK_BYTES and redis.call('HGET', k_request(c, id), 'state') == 'QUEUED' then
      spec = redis.call('HGET', k_request(c, id), 'spec') or ''
      journal = redis.call('GET', k_journal(c, id)) or ''
      bytes = bytes + #spec + #journal
    end
    reply[#reply + 1] = spec
    reply[#reply + 1] = journal
  end
  return reply
end
redis.register_function{function_name = 'autan_prompts', callback = autan_prompts, flags = {'no-writes'}}
